-- What is wished of jobs, each by its id and attempt; '' where that is stale. The others' leases are renewed, if so said.
local lease, wishes = tonumber(ARGV[1]), {}
for place = 2, #ARGV, 2 do
  local id = ARGV[place]
  local status = current(id, ARGV[place + 1])
  if status and lease > 0 then redis.call('ZADD', 'flowpp:leases', 'XX', seconds(now() + lease), id) end
  table.insert(wishes, status or '')
end
return wishes
