#!lua flags=allow-oom
-- What the learner has not seen yet: {state, pending, {entry, field-value list, record}...}.
-- `after` is '>' for new entries, or an entry id to go through those that were delivered and never arrived.
local epoch, step, consumer, count, after = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local fenced = fence(epoch, step)
if fenced then return fenced end
local group = 'learner:' .. epoch
local answer = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS', GROUPS, after)
local found = {redis.call('HGET', POLICY, 'state') or '', redis.call('XPENDING', GROUPS, group)[1]}
for _, entry in ipairs(answer and answer[1][2] or {}) do
  local fields, ordinal = entry[2] or {}, nil
  for i = 1, #fields, 2 do
    if fields[i] == 'ordinal' then ordinal = fields[i + 1] end
  end
  found[#found + 1] = {entry[1], fields, ordinal and redis.call('HGET', QUEUED, ordinal) or ''}
end
return found
