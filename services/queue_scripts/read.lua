#!lua flags=allow-oom
-- What the learner has not seen yet: {state, pending}, then "entry ordinal record" and body of each entry, '' for
-- what it lacks. `after` is '>' for new entries, or an entry id to go through those that were delivered and never
-- arrived.
local epoch, step, consumer, count, after = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local fenced = fence(epoch, step)
if fenced then return fenced end
local group = 'learner:' .. epoch
local answer = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS', GROUPS, after)
local found = {redis.call('HGET', POLICY, 'state') or '', redis.call('XPENDING', GROUPS, group)[1]}
local entries, ordinals = answer and answer[1][2] or {}, {}
for n, entry in ipairs(entries) do
  local fields, values = entry[2] or {}, {}
  for i = 1, #fields, 2 do values[fields[i]] = fields[i + 1] end
  entry.values = values
  ordinals[n] = values.ordinal or ''
end
local records = #ordinals > 0 and redis.call('HMGET', QUEUED, unpack(ordinals)) or {}
for n, entry in ipairs(entries) do
  local values = entry.values
  -- What no admit wrote may hold anything.
  local ordinal = records[n] and values.ordinal or '-'
  found[#found + 1] = entry[1] .. ' ' .. ordinal .. ' ' .. (records[n] or '')
  found[#found + 1] = values.group or ''
end
return found
