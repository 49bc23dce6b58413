#!lua
-- One whole group in, or a reason why not. XADD is the first write: without memory nothing has happened yet.
local ordinal, epoch, step, worker = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local max_attempts, max_groups, max_bytes = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local header, payload, digest = ARGV[8], ARGV[9], ARGV[10]

local now_epoch, now_step, max_staleness, next, bytes = policy('epoch', 'step', 'max_staleness', 'next', 'bytes')
if not now_epoch or tonumber(ordinal) >= next then return 'OUTSIDE_LINEAGE' end
if is_resolved(ordinal) or redis.call('HEXISTS', QUEUED, ordinal) == 1 then return 'DUP' end

local holder = leased_by(ordinal)
local verdict = place_in_lineage(epoch, step)
if verdict == 'INSIDE' and now_step - step > max_staleness then verdict = 'STALE' end
if verdict ~= 'INSIDE' then
  -- Another worker may hold the ordinal by now: then it is in good hands.
  if holder == worker then
    if verdict == 'FUTURE' then
      local reason = worker .. ' sent version ' .. epoch .. '.' .. step .. ' from the future'
      retry_or_give_up(ordinal, worker, reason, max_attempts)
    else
      make_issuable(ordinal, false)
    end
  end
  return verdict
end

local size = #header + #payload
if redis.call('HLEN', QUEUED) >= max_groups or bytes + size > max_bytes then return 'FULL' end
local id = redis.call('XADD', GROUPS, '*', 'ordinal', ordinal, 'header', header, 'payload', payload, 'sha256', digest)
redis.call('HSET', QUEUED, ordinal, id .. ' ' .. epoch .. ' ' .. step .. ' ' .. size .. ' ' .. worker)
redis.call('HINCRBY', POLICY, 'bytes', size)
if holder then unlease(ordinal) end
redis.call('ZREM', AGAIN, ordinal)
return 'OK'
