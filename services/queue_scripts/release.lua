#!lua flags=allow-oom
-- Ordinals given back unworked (counted 0), or taken from a worker that died (counted 1).
local worker, counted, max_attempts, reason = ARGV[1], ARGV[2] == '1', ARGV[3], ARGV[4]
local released = {}
local function give_back(ordinal)
  if leased_by(ordinal) ~= worker then return end
  if counted then
    retry_or_give_up(ordinal, worker, reason, max_attempts)
  else
    make_issuable(ordinal, false)
  end
  released[#released + 1] = ordinal
end
if counted then
  redis.call('ZREM', LINE, worker)
  redis.call('ZREM', CALLED, worker)
  call_waiting()
end
if #ARGV > 4 then
  for i = 5, #ARGV do give_back(ARGV[i]) end
else
  for _, ordinal in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do give_back(ordinal) end
end
return released
