#!lua flags=allow-oom
-- 1 if the worker still holds the ordinal, for another lease.
local worker, ordinal, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
if leased_by(ordinal) ~= worker then return 0 end
redis.call('ZADD', LEASES, now_ms() + lease_ms, ordinal)
return 1
