-- What is stored of a job as of `at` is whole. The answer: what of it is to be deleted now, or 'missing': all.
local id, at = ARGV[1], ARGV[2]
if tonumber(redis.call('ZSCORE', 'flowpp:changed', id) or -1) == tonumber(at) then
  redis.call('ZREM', 'flowpp:changed', id)
end
if get(id, 'status') == '' then return 'missing' end
local before = get(id, 'recorded')
if before == at then return '' end
if before ~= '' and tonumber(before) > tonumber(at) then return at end
set(id, 'recorded', at)
return before
