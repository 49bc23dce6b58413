#!lua flags=allow-oom
-- A payload has arrived, or was refused: the leave that it had may be taken again. Each has a number, and is in the list
-- at most once: one that was given out anew while it seemed lost is one again when both come back.
-- ARGV: its number, or 0 for who has waited in vain; how many there are; how long a leave that is not lost may be away.
local number, leaves, away_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local function put_back(leave)
  redis.call('LREM', UPLOADS, 0, leave)
  redis.call('RPUSH', UPLOADS, leave)
end

if number > 0 then
  if number <= leaves then put_back(number) end
  redis.call('HSET', POLICY, 'left', now)
  return number
end
-- As long as others come back nothing is lost: there are many who wait.
local last = tonumber(redis.call('HGET', POLICY, 'left') or 0)
if now >= last and now - last < away_ms then return 0 end
local there = {}
for _, leave in ipairs(redis.call('LRANGE', UPLOADS, 0, -1)) do there[tonumber(leave)] = true end
for leave = 1, leaves do
  if not there[leave] then put_back(leave) end
end
redis.call('HSET', POLICY, 'left', now)
return 0
