#!lua flags=allow-oom
-- The next ordinal for a worker. Backpressure lives here, before any work is spent.
local worker, nonce, lease_ms, max_attempts = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local state = redis.call('HGET', POLICY, 'state')
if is_ended(state) then return {'ENDED', state} end
redis.call('DEL', call_key(worker))
local function stand_in_line()
  forget_late()
  if redis.call('ZSCORE', LINE, worker) or redis.call('ZSCORE', CALLED, worker) then return end
  redis.call('ZADD', LINE, redis.call('HINCRBY', POLICY, 'ticket', 1), worker)
end
local epoch, step = policy('epoch', 'step')
if not epoch then
  stand_in_line()
  return {'WAIT', -1}
end

-- A client whose connection broke asks again with the same nonce: it gets what it was already given.
local last_nonce, last_ordinal = string.match(redis.call('HGET', ISSUED, worker) or '', '^(%S+) (%d+)$')
if last_nonce == nonce and leased_by(last_ordinal) == worker then
  local attempt, at_epoch, at_step = string.match(redis.call('HGET', LEASE, last_ordinal), '^(%d+) (%d+) (%d+)')
  return {'LEASE', last_ordinal, attempt, at_epoch, at_step}
end

local now = now_ms()
local function give(ordinal)
  redis.call('ZREM', LINE, worker)
  redis.call('ZREM', CALLED, worker)
  local attempt = redis.call('HINCRBY', ATTEMPTS, ordinal, 1)
  redis.call('ZADD', LEASES, now + lease_ms, ordinal)
  redis.call('HSET', LEASE, ordinal, attempt .. ' ' .. epoch .. ' ' .. step .. ' ' .. now .. ' ' .. worker)
  redis.call('HSET', ISSUED, worker, nonce .. ' ' .. ordinal)
  return {'LEASE', ordinal, attempt, epoch, step}
end

-- The clock went back: no lease ends later than one that is given now.
for _, ordinal in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. now + lease_ms, '+inf')) do
  redis.call('ZADD', LEASES, now + lease_ms, ordinal)
end

while true do
  local ordinal = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, 1)[1]
  if not ordinal then break end
  local attempts = tonumber(redis.call('HGET', ATTEMPTS, ordinal) or 0)
  if attempts < max_attempts then
    local given = give(ordinal)
    -- It takes no room: what was kept for this worker is another's.
    call_waiting()
    return given
  end
  local holder = leased_by(ordinal) or '?'
  give_up(ordinal, holder, 'its lease expired ' .. attempts .. ' times, last held by ' .. holder)
end

-- Nobody overtakes those who have waited longer.
stand_in_line()
call_waiting()
if redis.call('ZREM', CALLED, worker) == 1 then
  if room() > 0 then
    redis.call('DEL', call_key(worker))
    local ordinal = redis.call('ZPOPMIN', AGAIN)[1]
    if not ordinal then
      ordinal = redis.call('HINCRBY', POLICY, 'next', 1) - 1
    end
    return give(ordinal)
  end
  -- Its place was taken by a group that nobody had leased any more.
  redis.call('ZADD', LINE, 0, worker)
end

-- The first in the line comes for the next lease that expires.
local first = redis.call('ZRANK', LINE, worker) == 0 and redis.call('ZRANGE', LEASES, 0, 0, 'WITHSCORES') or {}
return {'WAIT', first[2] and math.max(0, tonumber(first[2]) - now) or -1}
