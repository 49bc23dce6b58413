#!lua flags=allow-oom
-- Trained, acknowledged, published: one transaction, so no ordinal of the next step is issued before it and no
-- group is trained twice.
local epoch, step, kind, announcement = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local mark = epoch .. '.' .. (step + 1) .. ' ' .. redis.sha1hex(table.concat(ARGV, ' '))
if redis.call('HGET', POLICY, 'committed') == mark then return {'OK'} end
local fenced = fence(epoch, step)
if fenced then return fenced end
local ordinals = {unpack(ARGV, 5)}
if #ordinals > 0 then
  local records, resolved = queued(ordinals), redis.call('ZMSCORE', RESOLVED, unpack(ordinals))
  local below, members = policy('below'), {}
  for i, ordinal in ipairs(ordinals) do
    if tonumber(ordinal) < below or resolved[i] then return {'RESOLVED', ordinal} end
    if not records[i] then return {'NOT_QUEUED', ordinal} end
    members[2 * i - 1], members[2 * i] = ordinal, ordinal
  end
  unqueue(ordinals, records)
  redis.call('HDEL', ATTEMPTS, unpack(ordinals))
  redis.call('ZADD', RESOLVED, unpack(members))
  advance_frontier()
end
redis.call('HINCRBY', POLICY, 'trained', #ordinals)
redis.call('HSET', POLICY, 'step', step + 1, 'committed', mark)
announce(kind, announcement)
call_waiting()
return {'OK'}
