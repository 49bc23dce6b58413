#!lua flags=no-writes,allow-oom
-- One consistent look at the queue.
return {
  redis.call('HGETALL', POLICY),
  redis.call('ZRANGE', LEASES, 0, -1, 'WITHSCORES'),
  redis.call('HGETALL', LEASE),
  redis.call('HKEYS', QUEUED),
  redis.call('ZCARD', AGAIN),
  redis.call('ZRANGE', AGAIN, 0, 15),
  redis.call('SCARD', DEAD_ORDINALS),
  now_ms(),
  redis.call('ZCARD', LINE),
  redis.call('ZRANGE', CALLED, 0, -1),
}
