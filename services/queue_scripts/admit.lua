#!lua
-- Whole groups in, each with a verdict of its own. Without memory the server refuses the script as a whole.
-- ARGV: three bounds, then "ordinal epoch step header_bytes payload_bytes place sha256 worker" and the body of each
-- group. The body is header and payload, or the header alone where the place is 'beside': the payload was SET before,
-- with a time to live, under the next of the keys after the eighteen, and is kept by this script or not at all.
local max_attempts, max_groups, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local BOUNDS, VALUES, blobs_seen = 3, 2, 18

local now_epoch, now_step, max_staleness, next, below, bytes =
  policy('epoch', 'step', 'max_staleness', 'next', 'below', 'bytes')
local depth = redis.call('HLEN', QUEUED)

local ordinals = {}
for i = BOUNDS + 1, #ARGV, VALUES do ordinals[#ordinals + 1] = string.match(ARGV[i], '^%d+') end
local leases = redis.call('HMGET', LEASE, unpack(ordinals))
local admitted, records, size_of_all = {}, {}, 0

-- Why the group cannot be admitted, and whether its payload must stay: it is then the admitted group's own.
local function obstacle(ordinal, epoch, step, worker, holder, digest, whole, size)
  if not now_epoch or tonumber(ordinal) >= next then return 'OUTSIDE_LINEAGE' end
  if admitted[ordinal] then return 'DUP', admitted[ordinal] == digest end
  -- An ordinal is in one place: what this worker holds is neither resolved nor queued.
  if holder ~= worker then
    if tonumber(ordinal) < below or redis.call('ZSCORE', RESOLVED, ordinal) then return 'DUP' end
    local record = queued({ordinal})[1]
    if record then return 'DUP', record.sha256 == digest end
  end
  local verdict = 'INSIDE'
  if epoch ~= now_epoch or step > now_step then verdict = place_in_lineage(epoch, step) end
  if verdict == 'INSIDE' and now_step - step > max_staleness then verdict = 'STALE' end
  if verdict == 'INSIDE' then
    -- A payload that is not whole could not be stored, or was sent longer ago than it lives.
    local full = not whole or depth >= max_groups or bytes + size > max_bytes
    return full and 'FULL' or nil
  end
  -- Another worker may hold the ordinal by now: then it is in good hands.
  if holder == worker and verdict == 'FUTURE' then
    local reason = worker .. ' sent version ' .. epoch .. '.' .. step .. ' from the future'
    retry_or_give_up(ordinal, worker, reason, max_attempts)
  elseif holder == worker then
    make_issuable(ordinal, false)
  end
  return verdict
end

local answers, unheld = {}, {}
for n, ordinal in ipairs(ordinals) do
  local at = BOUNDS + (n - 1) * VALUES
  local description, body = string.match(ARGV[at + 1], '^%d+ (.*)$'), ARGV[at + 2]
  local epoch, step, header_bytes, payload_bytes, place, digest, worker =
    string.match(description, '^(%d+) (%d+) (%d+) (%d+) (%S+) (%S+) (.*)$')
  epoch, step = tonumber(epoch), tonumber(step)
  local size, blob = header_bytes + payload_bytes, nil
  if place == 'beside' then
    blobs_seen = blobs_seen + 1
    blob = KEYS[blobs_seen]
  end
  local whole = not blob or redis.call('STRLEN', blob) == tonumber(payload_bytes)
  local holder = leases[n] and string.match(leases[n], '^%d+ %d+ %d+ %d+ (.*)$')
  local verdict, stays = obstacle(ordinal, epoch, step, worker, holder, digest, whole, size)
  if verdict then
    if blob and not stays then redis.call('UNLINK', blob) end
  else
    local id = redis.call('XADD', GROUPS, '*', 'ordinal', ordinal, 'group', body)
    if blob then redis.call('PERSIST', blob) end
    admitted[ordinal] = digest
    records[#records + 1] = ordinal
    records[#records + 1] = id .. ' ' .. description
    if not holder then unheld[#unheld + 1] = ordinal end
    depth, bytes, size_of_all = depth + 1, bytes + size, size_of_all + size
  end
  answers[n] = verdict or 'OK'
end

if #records > 0 then
  local places = {}
  for i = 1, #records, 2 do places[#places + 1] = records[i] end
  redis.call('HSET', QUEUED, unpack(records))
  redis.call('HINCRBY', POLICY, 'bytes', size_of_all)
  redis.call('ZREM', LEASES, unpack(places))
  redis.call('HDEL', LEASE, unpack(places))
  if #unheld > 0 then redis.call('ZREM', AGAIN, unpack(unheld)) end
end
return answers
