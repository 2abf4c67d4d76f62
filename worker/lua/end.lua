-- Attempts that have ended, each by what follows. The answers: what the jobs now are; false where that was no attempt of it.
local function ended(id, attempt, outcome, code, message, result, artifacts, progress)
  read(id)
  if not current(id, attempt) then return false end
  if progress ~= '' then set(id, 'progress', progress) end
  if result ~= '' then set(id, 'result', result) end
  if get(id, 'type') == 'training' then
    for checkpoint in string.gmatch(result, '"(ckpt_%x+)"') do -- of which one may have been deleted meanwhile
      if redis.call('EXISTS', 'flowpp:checkpoint:' .. checkpoint) == 0 then forget_checkpoint(id, checkpoint) end
    end
  end
  if artifacts ~= '' then set(id, 'artifacts', artifacts) end
  return settle(id, outcome, code, message)
end

local answers = {}
for place = 1, #ARGV, 8 do table.insert(answers, ended(unpack(ARGV, place, place + 7))) end
return answers
