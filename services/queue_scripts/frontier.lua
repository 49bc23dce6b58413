#!lua flags=no-writes,allow-oom
-- What is resolved. A learner names the version that it is at: with what a server that has lost its data says, a
-- checkpoint would let everything be trained again.
local epoch, step = ARGV[1], ARGV[2]
local fenced = epoch and fence(epoch, step)
if fenced then return fenced end
return {
  'OK',
  policy('below') or 0,
  redis.call('ZRANGE', RESOLVED, 0, -1),
  redis.call('SMEMBERS', DEAD_ORDINALS),
}
