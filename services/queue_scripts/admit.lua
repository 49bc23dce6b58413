#!lua
-- One whole group in, or a reason why not. XADD is the first write: without memory nothing has happened yet.
-- A large payload was SET beside, with a time to live: it is kept by this script or not at all.
local ordinal, epoch, step, worker = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local max_attempts, max_groups, max_bytes = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local header, digest, size, payload = ARGV[8], ARGV[9], tonumber(ARGV[10]), ARGV[11]
local blob = KEYS[16]

local now_epoch, now_step, max_staleness, next, below, bytes =
  policy('epoch', 'step', 'max_staleness', 'next', 'below', 'bytes')

local function refuse(verdict)
  if blob then redis.call('UNLINK', blob) end
  return verdict
end

if not now_epoch or tonumber(ordinal) >= next then return refuse('OUTSIDE_LINEAGE') end
local holder = leased_by(ordinal)
-- An ordinal is in one place: what this worker holds is neither resolved nor queued.
if holder ~= worker then
  if tonumber(ordinal) < below or redis.call('ZSCORE', RESOLVED, ordinal) then return refuse('DUP') end
  local record = queued({ordinal})[1]
  -- The same group sent twice has the same blob, which must stay.
  if record then return record[5] == digest and 'DUP' or refuse('DUP') end
end

local verdict = 'INSIDE'
if epoch ~= now_epoch or step > now_step then verdict = place_in_lineage(epoch, step) end
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
  return refuse(verdict)
end

-- A blob that is not whole could not be stored, or took longer than it lives.
local whole = not blob or redis.call('STRLEN', blob) == size - #header
if not whole or redis.call('HLEN', QUEUED) >= max_groups or bytes + size > max_bytes then return refuse('FULL') end
local id
if blob then
  id = redis.call('XADD', GROUPS, '*', 'ordinal', ordinal, 'header', header, 'sha256', digest)
  redis.call('PERSIST', blob)
else
  id = redis.call('XADD', GROUPS, '*', 'ordinal', ordinal, 'header', header, 'sha256', digest, 'payload', payload)
end
redis.call('HSET', QUEUED, ordinal,
  id .. ' ' .. epoch .. ' ' .. step .. ' ' .. size .. ' ' .. (blob and digest or '-') .. ' ' .. worker)
redis.call('HINCRBY', POLICY, 'bytes', size)
if holder then
  unlease(ordinal)
else
  redis.call('ZREM', AGAIN, ordinal)
end
return 'OK'
