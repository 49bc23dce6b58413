#!lua flags=allow-oom
-- Trained, acknowledged, published: one transaction, so no ordinal of the next step is issued before it and no
-- group is trained twice.
local epoch, step, kind, announcement = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local mark = epoch .. '.' .. (step + 1) .. ' ' .. redis.sha1hex(table.concat(ARGV, ' '))
if redis.call('HGET', POLICY, 'committed') == mark then return {'OK'} end
local fenced = fence(epoch, step)
if fenced then return fenced end
for i = 5, #ARGV do
  if is_resolved(ARGV[i]) then return {'RESOLVED', ARGV[i]} end
  if redis.call('HEXISTS', QUEUED, ARGV[i]) == 0 then return {'NOT_QUEUED', ARGV[i]} end
end
for i = 5, #ARGV do
  unqueue(ARGV[i])
  resolve(ARGV[i])
end
advance_frontier()
redis.call('HINCRBY', POLICY, 'trained', #ARGV - 4)
redis.call('HSET', POLICY, 'step', step + 1, 'committed', mark)
announce(kind, announcement)
wake()
return {'OK'}
