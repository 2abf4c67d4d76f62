local queue, worker, lease, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local large, larges, awake = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local waiting = redis.call('ZRANGE', 'flowpp:queued:' .. queue, 0, 255)
local taken, group, filled = {}, nil, 0
for _, id in ipairs(waiting) do
  local known = redis.call('HMGET', key(id), 'size', 'group')
  local size = tonumber(known[1])
  local fits = filled + size <= capacity or #taken == 0
  if size > large then fits = larges > 0 end
  if fits and (#taken == 0 or known[2] == group) then
    group = known[2]
    read(id)
    if size > large then larges = larges - 1 else filled = filled + size end
    set(id, 'attempt', tonumber(get(id, 'attempt')) + 1)
    if get(id, 'started_at') == '' then set(id, 'started_at', seconds(now())) end
    local said = 'attempt ' .. get(id, 'attempt') .. ' begins'
    if get(id, 'ended') ~= '' then said = said .. '; the one before ended: ' .. get(id, 'ended') end
    become(id, 'running', {worker = worker, message = said})
    zadd('flowpp:leases', seconds(now() + lease), id)
    if queue == 'training' then zadd('flowpp:training', seconds(now()), id) end
    table.insert(taken, {id, whole(id)})
    if group == '' or filled >= capacity then break end
  end
end
if #taken > 0 then redis.call('HSET', 'flowpp:turn:' .. queue, '', get(taken[#taken][1], 'turn')) end
if awake > 0 then
  local t, until_ = now(), tonumber(redis.call('ZSCORE', 'flowpp:awake:' .. queue, worker) or 0)
  if #taken > 0 or until_ - t < awake / 2 then
    redis.call('ZADD', 'flowpp:awake:' .. queue, seconds(t + awake), worker)
  end
end
return taken
