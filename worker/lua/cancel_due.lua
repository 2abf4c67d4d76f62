local message = 'cancelled: its Cancel-After ran out'
local due = redis.call('ZRANGEBYSCORE', 'flowpp:deadlines', '-inf', seconds(now()), 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  local status = get(id, 'status')
  zrem('flowpp:deadlines', id)
  if HELD[status] then
    if status ~= 'cancelling' then
      set(id, 'cancelled_by', message)
      wish(id, 'cancelling', message)
    end
  elseif status == 'queued' or status == 'paused' then
    become(id, 'cancelled', {message = message})
  end
end
return due
