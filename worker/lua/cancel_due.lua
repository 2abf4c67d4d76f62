local message = 'cancelled: its Cancel-After ran out'
local due = redis.call('ZRANGEBYSCORE', 'flowpp:deadlines', '-inf', seconds(now()), 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  local status = get(id, 'status')
  redis.call('ZREM', 'flowpp:deadlines', id)
  if HELD[status] then
    if status ~= 'cancelling' then
      set(id, 'cancelled_by', message)
      wish(id, 'cancelling', message)
    end
  else
    become(id, 'cancelled', {message = message})
  end
end
return due
