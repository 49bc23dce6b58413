#!lua flags=allow-oom
-- The run's state, and why. Waiting workers are woken to see it.
redis.call('HSET', POLICY, 'state', ARGV[1], 'reason', ARGV[2])
wake()
return 'OK'
