#!lua flags=allow-oom
-- A payload has arrived, or was refused: the leave that it had may be taken again. Each has a number, and is in the list
-- at most once: one that was given out anew while it seemed lost is one again when both come back.
-- ARGV: its number, or 0 for who has waited in vain; how many there are; how long that one has waited.
local number, leaves, waited_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local function put_back(leave)
  redis.call('LREM', UPLOADS, 0, leave)
  redis.call('RPUSH', UPLOADS, leave)
  redis.call('HSET', POLICY, 'leave:' .. leave, now)
end

if number > 0 then
  if number <= leaves then put_back(number) end
  return number
end
-- The list was empty for as long as that one has waited: what has not come back since is lost with who had it.
for leave = 1, leaves do
  local back = tonumber(redis.call('HGET', POLICY, 'leave:' .. leave) or 0)
  if back > now or now - back >= waited_ms then put_back(leave) end
end
return 0
