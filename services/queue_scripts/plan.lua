#!lua flags=allow-oom
-- Which place of the prompts each ordinal takes, as a learner with a curriculum assigns them: all that are not resolved,
-- in one piece. The epoch tells workers whether what they read is the word of the learner whose ordinal they hold.
local fenced = fence(ARGV[1], ARGV[2])
if fenced then return fenced end
redis.call('DEL', PLAN)
redis.call('HSET', PLAN, 'epoch', ARGV[1])
for i = 3, #ARGV, 2 do redis.call('HSET', PLAN, ARGV[i], ARGV[i + 1]) end
return {'OK'}
