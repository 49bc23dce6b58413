#!lua flags=allow-oom
-- The learner cannot train an admitted group: out of the stream, and to be issued again.
local epoch, step, entry, ordinal = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local counted, reason, max_attempts = ARGV[5] == '1', ARGV[6], ARGV[7]
local fenced = fence(epoch, step)
if fenced then return fenced end
local record = queued({ordinal})[1]
if not record or record.entry ~= entry then
  redis.call('XACK', GROUPS, 'learner:' .. epoch, entry)
  redis.call('XDEL', GROUPS, entry)
  return {'GONE'}
end
unqueue({ordinal}, {record})
if counted then return {retry_or_give_up(ordinal, record.worker, reason, max_attempts)} end
make_issuable(ordinal, false)
return {'RETRY'}
