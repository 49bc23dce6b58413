#!lua flags=allow-oom
-- A worker could not make the group: RETRY by anyone, or DEAD after too many attempts.
local worker, ordinal, reason, max_attempts = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if leased_by(ordinal) ~= worker then
  return redis.call('SISMEMBER', DEAD_ORDINALS, ordinal) == 1 and 'DEAD' or 'RETRY'
end
return retry_or_give_up(ordinal, worker, reason, max_attempts)
