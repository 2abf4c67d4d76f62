local webhook, most, found = ARGV[1], tonumber(ARGV[2]), {}
local function add(delivery, due)
  local known = redis.call('HGETALL', 'flowpp:delivery:' .. delivery)
  if #known > 0 then table.insert(found, {delivery, due, known}) end
end
local waiting = redis.call('ZRANGE', place(webhook, 'pending'), 0, most - 1, 'WITHSCORES')
for i = 1, #waiting, 2 do add(waiting[i], waiting[i + 1]) end
for _, delivery in ipairs(redis.call('LRANGE', place(webhook, 'ended'), 0, most - 1)) do add(delivery, false) end
return found
