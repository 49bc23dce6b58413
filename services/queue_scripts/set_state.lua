#!lua flags=allow-oom
-- The run's state, and why. When it ends, everyone who waits is woken to see it.
local state, reason = ARGV[1], ARGV[2]
redis.call('HSET', POLICY, 'state', state, 'reason', reason)
if is_ended(state) then
  for _, worker in ipairs(redis.call('ZRANGE', LINE, 0, -1)) do wake(worker) end
  redis.call('DEL', LINE)
end
return 'OK'
