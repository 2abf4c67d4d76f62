-- What is stored of jobs, each as of `at`, is whole. The answer: what is to be deleted now, '' nothing, 'missing' all.
local function outdated(id, at)
  if tonumber(redis.call('ZSCORE', 'flowpp:changed', id) or -1) == tonumber(at) then
    zrem('flowpp:changed', id)
  end
  local known = redis.call('HMGET', key(id), 'status', 'recorded')
  if not known[1] then return 'missing' end
  local before = known[2] or ''
  if before == at then return '' end
  if before ~= '' and tonumber(before) > tonumber(at) then return at end
  set(id, 'recorded', at)
  return before
end

local answers = {}
for place = 1, #ARGV, 2 do table.insert(answers, outdated(ARGV[place], ARGV[place + 1])) end
return answers
