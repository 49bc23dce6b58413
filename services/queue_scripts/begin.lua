#!lua flags=allow-oom
-- A new epoch from a checkpoint: what was trained after it is issued again, what was sampled by versions that
-- this epoch never had is dropped, everything else stays.
local checkpoint, announcement = cjson.decode(ARGV[1]), ARGV[2]
local known, step = checkpoint.epoch, checkpoint.step
-- Sent twice over a connection that broke.
if redis.call('HGET', POLICY, 'begun') == checkpoint.nonce then return {'OK', policy('epoch')} end
local epoch = math.max(policy('epoch') or -1, known, checkpoint.newest_epoch) + 1
if checkpoint.proposed ~= epoch then return {'EPOCH', epoch} end

-- For each earlier epoch its first step and the last one that this history contains. The checkpoint's own epoch
-- is proven up to `step`; an epoch after it shares at most the step at which it branched off.
local lineage = redis.call('HGETALL', LINEAGE)
for i = 1, #lineage, 2 do
  local earlier, start, last = tonumber(lineage[i]), string.match(lineage[i + 1], '^(%d+) (%S+)$')
  start, last = tonumber(start), tonumber(last) or math.huge
  if earlier == known then
    last = step
  elseif earlier < known or known < 0 then
    last = math.min(last, step)
  else
    last = math.min(last, start, step)
  end
  redis.call('HSET', LINEAGE, earlier, start .. ' ' .. last)
end
if known >= 0 and redis.call('HEXISTS', LINEAGE, known) == 0 then
  redis.call('HSET', LINEAGE, known, step .. ' ' .. step)
end
redis.call('HSET', LINEAGE, epoch, step .. ' -')

-- The checkpoint says what is trained. The dead stay dead, also those that died after it.
redis.call('DEL', RESOLVED)
redis.call('HSET', POLICY, 'below', checkpoint.below)
for _, ordinal in ipairs(checkpoint.above) do redis.call('ZADD', RESOLVED, ordinal, ordinal) end
for _, ordinal in ipairs(checkpoint.dead) do redis.call('SADD', DEAD_ORDINALS, ordinal) end
local next = math.max(policy('next') or 0, checkpoint.below)
for _, ordinal in ipairs(redis.call('SMEMBERS', DEAD_ORDINALS)) do
  if tonumber(ordinal) >= checkpoint.below then redis.call('ZADD', RESOLVED, ordinal, ordinal) end
end
local highest = redis.call('ZRANGE', RESOLVED, -1, -1)[1]
if highest then next = math.max(next, highest + 1) end
advance_frontier()
local below = policy('below')
local trained = below + redis.call('ZCARD', RESOLVED) - redis.call('SCARD', DEAD_ORDINALS)
redis.call('HSET', POLICY, 'epoch', epoch, 'step', step, 'next', next, 'trained', trained,
  'window', checkpoint.window, 'limit', checkpoint.limit, 'max_staleness', checkpoint.max_staleness)
redis.call('HSET', POLICY, 'begun', checkpoint.nonce)
redis.call('HDEL', POLICY, 'committed')

local function keeps(ordinal, at_epoch, at_step)
  return not is_resolved(ordinal)
    and place_in_lineage(at_epoch, at_step) == 'INSIDE'
    and step - at_step <= checkpoint.max_staleness
end

local bytes = 0
for _, ordinal in ipairs(redis.call('HKEYS', QUEUED)) do
  local record = queued({ordinal})[1]
  if record.sha256 and keeps(ordinal, record.epoch, record.step) then
    bytes = bytes + record.bytes
  else
    redis.call('XDEL', GROUPS, record.entry)
    redis.call('HDEL', QUEUED, ordinal)
    if record.blob then redis.call('UNLINK', record.blob) end
  end
end
redis.call('HSET', POLICY, 'bytes', bytes)

local leases = redis.call('HGETALL', LEASE)
for i = 1, #leases, 2 do
  local _, at_epoch, at_step = string.match(leases[i + 1], '^(%d+) (%d+) (%d+)')
  if not keeps(leases[i], tonumber(at_epoch), tonumber(at_step)) then
    unlease(leases[i])
    -- Not the worker's fault: the issue does not count as an attempt.
    if tonumber(redis.call('HGET', ATTEMPTS, leases[i]) or 0) > 0 then
      redis.call('HINCRBY', ATTEMPTS, leases[i], -1)
    end
  end
end
redis.call('DEL', ISSUED)

redis.call('DEL', AGAIN)
for ordinal = below, next - 1 do
  if not redis.call('ZSCORE', RESOLVED, ordinal) and not redis.call('ZSCORE', LEASES, ordinal)
    and redis.call('HEXISTS', QUEUED, ordinal) == 0 then
    redis.call('ZADD', AGAIN, ordinal, ordinal)
  end
end

-- A consumer group of its own for each epoch: what a crashed learner had taken is delivered again, and a learner
-- that only seemed dead finds its group gone.
if redis.call('EXISTS', GROUPS) == 1 then
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', GROUPS)) do
    redis.call('XGROUP', 'DESTROY', GROUPS, info[2])
  end
end
redis.call('XGROUP', 'CREATE', GROUPS, 'learner:' .. epoch, '0', 'MKSTREAM')

local state = redis.call('HGET', POLICY, 'state')
if not state or state == 'starting' then redis.call('HSET', POLICY, 'state', 'running') end
redis.call('DEL', UPLOADS)
for leave = 1, checkpoint.uploads do redis.call('RPUSH', UPLOADS, leave) end
announce(checkpoint.kind, announcement)
call_waiting()
return {'OK', epoch}
