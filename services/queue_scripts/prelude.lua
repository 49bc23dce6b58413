-- Read before each script of the group queue: its keys by name, and the moves that several scripts make.
-- A lease is "attempt epoch step issued_ms worker"; a queued group is
-- "entry_id epoch step header_bytes payload_bytes place sha256 worker". Its entry holds header and payload in one piece
-- (place 'inline'), or the header alone: a large payload has a key of its own, named by the sha256 ('beside').
-- An ordinal is in exactly one place: leased, queued, again (issuable), resolved, or never issued (>= next).
local POLICY, GROUPS, QUEUED, LEASES, LEASE, ATTEMPTS, AGAIN, RESOLVED, DEAD, DEAD_ORDINALS, WEIGHTS, LATEST,
  LINEAGE, LINE, CALLED, ISSUED, PLAN, UPLOADS = unpack(KEYS)

-- A worker that is called and does not come for so long has lost its turn.
local CALL_MS = 2000

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function policy(...)
  local values = redis.call('HMGET', POLICY, ...)
  for i = 1, #values do
    values[i] = values[i] and tonumber(values[i])
  end
  return unpack(values, 1, #values)
end

local function key(name)
  return string.sub(POLICY, 1, -7) .. name
end

local function payload_key(sha256) return key('payload:' .. sha256) end
local function call_key(worker) return key('call:' .. worker) end

local function is_ended(state)
  return state == 'draining' or state == 'done' or state == 'failed'
end

-- How many more ordinals may be given out now.
local function room()
  local window, limit, trained = policy('window', 'limit', 'trained')
  if not window then return 0 end
  local outstanding = redis.call('ZCARD', LEASES) + redis.call('HLEN', QUEUED)
  return math.min(window, limit - trained) - outstanding
end

-- Each waiting worker blocks on a list of its own. What is put there before it does is not missed.
local function wake(worker)
  local list = call_key(worker)
  redis.call('RPUSH', list, 1)
  redis.call('PEXPIRE', list, CALL_MS)
end

local function forget_late()
  local now = now_ms()
  redis.call('ZREMRANGEBYSCORE', CALLED, '-inf', now)
  -- What lies further ahead than it can was there before the clock went back.
  redis.call('ZREMRANGEBYSCORE', CALLED, '(' .. now + CALL_MS, '+inf')
end

-- Those who have waited longest are called, as many as there is room for, and have it kept for them for a while.
local function call_waiting()
  local now = now_ms()
  forget_late()
  local free = room() - redis.call('ZCARD', CALLED)
  while free > 0 do
    local worker = redis.call('ZPOPMIN', LINE)[1]
    if not worker then break end
    redis.call('ZADD', CALLED, now + CALL_MS, worker)
    wake(worker)
    free = free - 1
  end
end

local function is_resolved(ordinal)
  local below = tonumber(redis.call('HGET', POLICY, 'below') or 0)
  return tonumber(ordinal) < below or redis.call('ZSCORE', RESOLVED, ordinal) ~= false
end

local function resolve(ordinal)
  redis.call('ZADD', RESOLVED, ordinal, ordinal)
  redis.call('HDEL', ATTEMPTS, ordinal)
end

-- Keeps what is recorded small: a number, and the few resolved ordinals above it.
local function advance_frontier()
  local first = tonumber(redis.call('HGET', POLICY, 'below') or 0)
  local below = first
  repeat
    local lowest = redis.call('ZRANGE', RESOLVED, below - first, below - first + 63)
    local n = 1
    while lowest[n] and tonumber(lowest[n]) == below do
      below, n = below + 1, n + 1
    end
  until n <= 64
  if below == first then return end
  redis.call('ZREMRANGEBYSCORE', RESOLVED, '-inf', below - 1)
  redis.call('HSET', POLICY, 'below', below)
end

local function leased_by(ordinal)
  local lease = redis.call('HGET', LEASE, ordinal)
  return lease and string.match(lease, '^%d+ %d+ %d+ %d+ (.*)$')
end

local function unlease(ordinal)
  redis.call('ZREM', LEASES, ordinal)
  redis.call('HDEL', LEASE, ordinal)
end

-- `blob` is the key of a payload that lies beside. What another version of this queue wrote has no sha256: it is good
-- for nothing but being taken out and made again.
local function queued(ordinals)
  local records = redis.call('HMGET', QUEUED, unpack(ordinals))
  for i = 1, #records do
    if records[i] then
      local entry, epoch, step, header_bytes, payload_bytes, place, sha256, worker =
        string.match(records[i], '^(%S+) (%d+) (%d+) (%d+) (%d+) (%S+) (%S+) (.*)$')
      records[i] = {entry = entry or string.match(records[i], '^%d+%-%d+') or '0-0',
        epoch = tonumber(epoch), step = tonumber(step),
        bytes = (header_bytes or 0) + (payload_bytes or 0), sha256 = sha256, worker = worker or '',
        blob = place == 'beside' and payload_key(sha256)}
    end
  end
  return records
end

-- XACK and XDEL together: XACK alone leaves the entry and its bytes.
local function unqueue(ordinals, records)
  local entries, blobs, bytes = {}, {}, 0
  for _, record in ipairs(records) do
    entries[#entries + 1] = record.entry
    bytes = bytes + record.bytes
    if record.blob then blobs[#blobs + 1] = record.blob end
  end
  redis.call('XACK', GROUPS, 'learner:' .. redis.call('HGET', POLICY, 'epoch'), unpack(entries))
  redis.call('XDEL', GROUPS, unpack(entries))
  redis.call('HDEL', QUEUED, unpack(ordinals))
  redis.call('HINCRBY', POLICY, 'bytes', -bytes)
  if #blobs > 0 then redis.call('UNLINK', unpack(blobs)) end
end

local function make_issuable(ordinal, counted)
  unlease(ordinal)
  if not counted and tonumber(redis.call('HGET', ATTEMPTS, ordinal) or 0) > 0 then
    redis.call('HINCRBY', ATTEMPTS, ordinal, -1)
  end
  redis.call('ZADD', AGAIN, ordinal, ordinal)
  call_waiting()
end

local function give_up(ordinal, worker, reason)
  local attempts = redis.call('HGET', ATTEMPTS, ordinal) or 0
  local epoch, step = policy('epoch', 'step')
  unlease(ordinal)
  redis.call('ZREM', AGAIN, ordinal)
  redis.call('XADD', DEAD, '*', 'ordinal', ordinal, 'attempts', attempts, 'worker', worker, 'reason', reason,
    'epoch', epoch, 'step', step)
  redis.call('SADD', DEAD_ORDINALS, ordinal)
  resolve(ordinal)
  advance_frontier()
  call_waiting()
end

local function retry_or_give_up(ordinal, worker, reason, max_attempts)
  if tonumber(redis.call('HGET', ATTEMPTS, ordinal) or 0) >= tonumber(max_attempts) then
    give_up(ordinal, worker, reason)
    return 'DEAD'
  end
  make_issuable(ordinal, true)
  return 'RETRY'
end

-- Is (epoch, step) a version that the surviving history had? 'FUTURE' if it is yet to come.
local function place_in_lineage(epoch, step)
  local now_epoch, now_step = policy('epoch', 'step')
  if epoch > now_epoch or (epoch == now_epoch and step > now_step) then return 'FUTURE' end
  if epoch == now_epoch then return 'INSIDE' end
  local record = redis.call('HGET', LINEAGE, epoch)
  if record and step <= tonumber(string.match(record, '^%d+ (%d+)$')) then return 'INSIDE' end
  return 'OUTSIDE_LINEAGE'
end

-- Learners name the version they are at. Another epoch: a newer learner has begun. Another step: the server
-- lost writes.
local function fence(epoch, step)
  local now_epoch, now_step = policy('epoch', 'step')
  if now_epoch == tonumber(epoch) and now_step == tonumber(step) then return nil end
  local kind = now_epoch and now_epoch > tonumber(epoch) and 'FENCED' or 'LOST'
  return {kind, now_epoch and (now_epoch .. '.' .. now_step) or 'none'}
end

local function announce(kind, announcement)
  redis.call('XADD', WEIGHTS, 'MAXLEN', 16, '*', 'announcement', announcement)
  redis.call('HSET', LATEST, kind, announcement)
end
