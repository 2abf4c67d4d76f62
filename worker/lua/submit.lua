-- Jobs, each by its id, its limits, what it claims, the number of its fields, and these. Each is submitted, or not, by itself.
local counts, there, heard = {}, {}, {}

-- How many a set has, with those that are added here.
local function count(command, set)
  if not counts[set] then counts[set] = redis.call(command, set) end
  return counts[set]
end

local function exists(resource)
  if there[resource] == nil then
    there[resource] = redis.call('EXISTS', 'flowpp:' .. kind_of(resource) .. ':' .. resource) == 1
  end
  return there[resource]
end

-- Whether each worker of a queue looks without a bell.
local function is_heard(queue)
  if heard[queue] == nil then
    local t = seconds(now())
    local awake = redis.call('ZCOUNT', 'flowpp:awake:' .. queue, t, '+inf')
    heard[queue] = awake > 0 and awake >= redis.call('ZCOUNT', 'flowpp:workers:' .. queue, t, '+inf')
  end
  return heard[queue]
end

local function submit(id, limit, most, claim, fields)
  if redis.call('EXISTS', key(id)) == 1 then -- it is sent again, since the answer was lost
    read(id)
    return {0, stored[id]}
  end
  local queued, unfinished = 'flowpp:queued:' .. fields.queue, 'flowpp:unfinished:' .. fields.owner
  if count('ZCARD', queued) >= limit then return 'full' end
  if count('SCARD', unfinished) >= most then return 'quota' end
  for resource in string.gmatch(fields.uses, '%S+') do
    if not exists(resource) then return resource end
  end
  counts[queued], counts[unfinished] = counts[queued] + 1, counts[unfinished] + 1
  for resource in string.gmatch(fields.uses, '%S+') do sadd('flowpp:uses:' .. resource, id) end
  local cancel_after = tonumber(fields.cancel_after)
  fields.cancel_after = nil
  create(id, fields)
  set(id, 'created_at', seconds(now()))
  set(id, 'sequence', redis.call('INCR', 'flowpp:sequence'))
  set(id, 'attempt', 0)
  set(id, 'failures', 0)
  if cancel_after then
    local due = seconds(now() + cancel_after)
    set(id, 'cancel_at', due)
    zadd('flowpp:deadlines', due, id)
  end
  index_job(id)
  become(id, 'queued')
  created(claim, id)
  return {is_heard(fields.queue) and 1 or 0, what_was_set(id)} -- the rest is known to who sent it
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
