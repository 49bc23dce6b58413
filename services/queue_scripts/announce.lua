#!lua flags=allow-oom
-- Weights beside the policy of a commit (the EMA, say), by the learner of this epoch only.
local epoch, step, kind, announcement = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fenced = fence(epoch, step)
if fenced then return fenced end
announce(kind, announcement)
return {'OK'}
