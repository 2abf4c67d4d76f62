-- Jobs, each by its id, its limits, what it claims, the number of its fields, and these. Each is submitted, or not, by itself.
local function submit(id, limit, most, claim, fields)
  if redis.call('EXISTS', key(id)) == 1 then -- it is sent again, since the answer was lost
    read(id)
    return {0, whole(id)}
  end
  if redis.call('ZCARD', 'flowpp:queued:' .. fields.queue) >= limit then return 'full' end
  if redis.call('SCARD', 'flowpp:unfinished:' .. fields.owner) >= most then return 'quota' end
  for resource in string.gmatch(fields.uses, '%S+') do
    if redis.call('EXISTS', 'flowpp:' .. kind_of(resource) .. ':' .. resource) == 0 then return resource end
  end
  for resource in string.gmatch(fields.uses, '%S+') do redis.call('SADD', 'flowpp:uses:' .. resource, id) end
  local cancel_after = tonumber(fields.cancel_after)
  fields.cancel_after = nil
  hold(id, {})
  for name, value in pairs(fields) do set(id, name, value) end
  local sequence = redis.call('INCR', 'flowpp:sequence')
  set(id, 'created_at', seconds(now()), 'sequence', sequence, 'attempt', 0, 'failures', 0)
  if cancel_after then
    local due = seconds(now() + cancel_after)
    set(id, 'cancel_at', due)
    redis.call('ZADD', 'flowpp:deadlines', due, id)
  end
  index_job(id)
  become(id, 'queued')
  created(claim, id)
  local t = seconds(now())
  local awake = redis.call('ZCOUNT', 'flowpp:awake:' .. fields.queue, t, '+inf')
  local heard = awake > 0 and awake >= redis.call('ZCOUNT', 'flowpp:workers:' .. fields.queue, t, '+inf')
  local added = {} -- the rest of the record is known to who sent it
  for name, value in pairs(records[id]) do
    if fields[name] == nil then
      table.insert(added, name)
      table.insert(added, value)
    end
  end
  return {heard and 1 or 0, added}
end

local answers, place = {}, 1
while place < #ARGV do
  local fields, first, last = {}, place + 5, place + 4 + 2 * tonumber(ARGV[place + 4])
  for at = first, last, 2 do fields[ARGV[at]] = ARGV[at + 1] end
  local limit, most = tonumber(ARGV[place + 1]), tonumber(ARGV[place + 2])
  table.insert(answers, submit(ARGV[place], limit, most, ARGV[place + 3], fields))
  place = last + 1
end
return answers
