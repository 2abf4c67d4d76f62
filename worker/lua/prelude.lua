-- Before each script. What is written in capitals is set here or by worker/transitions.py.

local TERMINAL = {succeeded = true, failed = true, cancelled = true}
local HELD = {running = true, pausing = true, cancelling = true}

local time -- stands still while a script runs
local function now()
  if not time then
    local t = redis.call('TIME')
    time = tonumber(t[1]) + tonumber(t[2]) / 1000000
  end
  return time
end

local function seconds(t) return string.format('%.6f', t) end
local function key(id) return 'flowpp:job:' .. id end

-- Records that the script has in whole, and the fields of them that it writes when it ends, all at once.
local records, unwritten = {}, {}
local stored = {} -- the same as HGETALL gave them
local is_new = {} -- of which all is to be written

local function hold(id, record)
  records[id], unwritten[id] = record, {}
end

local function read(id)
  if records[id] then return end
  local record, fields = {}, redis.call('HGETALL', key(id))
  for place = 1, #fields, 2 do record[fields[place]] = fields[place + 1] end
  stored[id] = fields
  hold(id, record)
end

local function create(id, record)
  is_new[id] = true
  hold(id, record)
end

local function get(id, field)
  local record = records[id]
  if record then return record[field] or '' end
  return redis.call('HGET', key(id), field) or ''
end

local function set(id, field, value)
  local record = records[id]
  if not record then
    redis.call('HSET', key(id), field, value)
    return
  end
  record[field] = tostring(value)
  unwritten[id][field] = true
end

-- Names and values of the fields `names` of a record that the script has.
local function append(fields, id, names)
  local record, last = records[id], #fields
  for name in pairs(names) do
    fields[last + 1], fields[last + 2] = name, record[name]
    last = last + 2
  end
  return fields
end

-- What was set of a record that the script has, and all of it, where a later value counts instead of an earlier one.
local function what_was_set(id) return append({}, id, unwritten[id]) end
local function whole(id) return append(stored[id], id, unwritten[id]) end

-- What is put into sets, and into sorted sets with a score, and what is taken out, when the script ends. Each set is
-- written once, however many jobs a script is about: Redis takes longer to be told a command than to obey it.
local sadded, sremoved, zadded, zremoved = {}, {}, {}, {}

local function put(into, out_of, set, member, score)
  if not into[set] then into[set] = {} end
  into[set][member] = score
  if out_of[set] then out_of[set][member] = nil end
end

local function sadd(set, member) put(sadded, sremoved, set, member, '') end
local function srem(set, member) put(sremoved, sadded, set, member, '') end
local function zadd(set, score, member) put(zadded, zremoved, set, member, score) end
local function zrem(set, member) put(zremoved, zadded, set, member, '') end

local MOST_ARGUMENTS = 1000 -- Lua unpacks no more than some thousand

local function write_sets(command, sets)
  for set, members in pairs(sets) do
    local arguments = {}
    for member, score in pairs(members) do
      if score ~= '' then table.insert(arguments, score) end
      table.insert(arguments, member)
    end
    for first = 1, #arguments, MOST_ARGUMENTS do
      redis.call(command, set, unpack(arguments, first, math.min(first + MOST_ARGUMENTS - 1, #arguments)))
    end
  end
end

-- What else is written when the script ends and nothing can fail any more: the next turns of queues' owners, events that
-- say what became of jobs, commands, and which jobs have finished.
local next_turns, untold, commands, finished = {}, {}, {}, {}

local function later(...) table.insert(commands, {...}) end

local emit -- below

local function write()
  write_sets('ZREM', zremoved) -- first, as a full server still lets go, and then lets us finish
  write_sets('SREM', sremoved)
  write_sets('ZADD', zadded)
  write_sets('SADD', sadded)
  for id, names in pairs(unwritten) do
    local fields = append({}, id, is_new[id] and records[id] or names)
    if #fields > 0 then redis.call('HSET', key(id), unpack(fields)) end
  end
  for turns, owners in pairs(next_turns) do
    for owner, turn in pairs(owners) do redis.call('HSET', turns, owner, string.format('%.0f', turn)) end
  end
  for _, event in ipairs(untold) do emit(unpack(event)) end
  for _, command in ipairs(commands) do redis.call(unpack(command)) end
  if #finished > 0 then redis.call('PUBLISH', 'flowpp:finished', table.concat(finished, ' ')) end
end

local notify -- in webhooks.lua

function emit(id, kind, data)
  local event = redis.call('XADD', key(id) .. ':events', 'MAXLEN', '~', MAX_EVENTS, '*', 'type', kind, 'data', data)
  if kind == 'status' or kind == 'checkpoint' then notify(id, kind, data, event) end
  return event
end

-- Marks a job for the recorder (worker/recorder.py) by when it changed: Unix microseconds, which grow whatever the clock
-- does, as they order what is stored of the job.
local function changed(id)
  local t = math.max(math.floor(now() * 1000000), tonumber(get(id, 'changed')) or 0) + 1
  set(id, 'changed', string.format('%.0f', t))
  zadd('flowpp:changed', string.format('%.0f', t), id)
end

-- The attempt that writes is the one that holds the job: else its writes are refused.
local function current(id, attempt)
  local known = records[id] and {get(id, 'status'), get(id, 'attempt')}
    or redis.call('HMGET', key(id), 'status', 'attempt')
  if HELD[known[1]] and known[2] == attempt then return known[1] end
  return nil
end

local function kind_of(resource)
  return string.sub(resource, 1, 3) == 'ds_' and 'dataset' or 'checkpoint'
end

local function owner_of(record) return record.owner or 'local' end

-- The newest dataset of each content that an owner has.
local function contents_of(owner) return 'flowpp:contents:' .. owner end

-- Indices of datasets, checkpoints and keys, and what they take of their owner's quota.
local function index(kind, id, record, sequence)
  local list = 'flowpp:' .. kind .. 's'
  redis.call('ZADD', list, sequence, id)
  redis.call('ZADD', list .. ':owner:' .. owner_of(record), sequence, id)
  if record.bytes then redis.call('HINCRBY', 'flowpp:bytes', owner_of(record), record.bytes) end
  if kind == 'dataset' then redis.call('HSET', contents_of(owner_of(record)), record.sha256, id) end
end

-- Removes such a record with its indices; whether there was one.
local function remove(kind, id)
  local written = redis.call('GET', 'flowpp:' .. kind .. ':' .. id)
  if not written then return false end
  local record, list = cjson.decode(written), 'flowpp:' .. kind .. 's'
  redis.call('DEL', 'flowpp:' .. kind .. ':' .. id)
  redis.call('ZREM', list, id)
  redis.call('ZREM', list .. ':owner:' .. owner_of(record), id)
  if record.bytes then redis.call('HINCRBY', 'flowpp:bytes', owner_of(record), -record.bytes) end
  local contents = contents_of(owner_of(record))
  if kind == 'dataset' and redis.call('HGET', contents, record.sha256) == id then
    redis.call('HDEL', contents, record.sha256)
  end
  return true
end

-- A job's result names no checkpoint that is not there. What else it says stays as it is written.
local function forget_checkpoint(id, checkpoint)
  local result = get(id, 'result')
  local without, found = string.gsub(result, '"' .. checkpoint .. '"', 'null')
  if found > 0 then set(id, 'result', without) end
  return found > 0
end

local function at_least_sequence(sequence)
  if tonumber(sequence) > tonumber(redis.call('GET', 'flowpp:sequence') or 0) then
    redis.call('SET', 'flowpp:sequence', sequence)
  end
end

-- Indices of a job by what its record says.
local function index_job(id)
  local sequence, owner = get(id, 'sequence'), get(id, 'owner')
  zadd('flowpp:jobs', sequence, id)
  zadd('flowpp:jobs:owner:' .. owner, sequence, id)
  sadd('flowpp:owners', owner)
  if not TERMINAL[get(id, 'status')] then sadd('flowpp:unfinished:' .. owner, id) end
end

-- What a request with an Idempotency-Key has created: told to whoever sends it again, for a day.
local function created(claim, id)
  if claim ~= '' then
    local said = cjson.decode(claim)
    later('SET', said.key, cjson.encode({fingerprint = said.fingerprint, id = id}), 'EX', 86400)
  end
end

-- A job's turn, kept for its life: owners take turns in proportion to what their jobs ask for, however many they send
-- (start-time fair queueing; Goyal, Vin, Cheng 1996).
local function take_turn(id, queue)
  local turns, owner = 'flowpp:turn:' .. queue, get(id, 'owner')
  if not next_turns[turns] then next_turns[turns] = {} end
  local turn = next_turns[turns][owner]
  if not turn then
    local known = redis.call('HMGET', turns, '', owner)
    turn = math.max(tonumber(known[1] or 0), tonumber(known[2] or 0))
  end
  next_turns[turns][owner] = turn + math.max(1, tonumber(get(id, 'size')))
  set(id, 'turn', string.format('%.0f', turn))
end

-- Images that came with a request are most of its record, and nobody asks for them when it is answered.
local function forget_images(id)
  local written = get(id, 'plan')
  local plan = written ~= '' and cjson.decode(written) or {}
  if plan.images == nil then return end
  plan.images = nil
  set(id, 'plan', cjson.encode(plan))
end

-- Of an attempt that has ended, or of none yet.
local function forget_estimate(id)
  local written = get(id, 'progress')
  if written == '' or string.find(written, '"estimated_finish_at":null', 1, true) then return end
  local progress = cjson.decode(written)
  progress.estimated_finish_at = nil
  set(id, 'progress', cjson.encode(progress))
end

-- The list that a job is in by what it now is.
local function list_of(known)
  return table.concat({'flowpp:jobs:status', known[1] or '', known[2], known[3]}, ':')
end

local function enlist(id)
  read(id)
  if get(id, 'status') == '' then return end
  zadd(list_of({get(id, 'owner'), get(id, 'type'), get(id, 'status')}), get(id, 'sequence'), id)
end

-- Not while a server's older jobs are put into the lists (index.lua).
local function all_listed() return redis.call('GET', 'flowpp:indexed') == '1' end

local function delist(id)
  read(id)
  if get(id, 'status') == '' then return end
  zrem(list_of({get(id, 'owner'), get(id, 'type'), get(id, 'status')}), id)
end

local function set_status(id, status)
  delist(id)
  set(id, 'status', status)
  enlist(id)
end

-- The one place where a status changes.
local function become(id, status, data)
  read(id)
  local queue, before, t = get(id, 'queue'), get(id, 'status'), now()
  if before == 'queued' then zrem('flowpp:queued:' .. queue, id) end
  if HELD[before] then
    zrem('flowpp:leases', id)
    if queue == 'training' then zrem('flowpp:training', id) end
  end
  set_status(id, status)
  forget_estimate(id)
  if status == 'queued' then
    if get(id, 'turn') == '' then take_turn(id, queue) end
    zadd('flowpp:queued:' .. queue, get(id, 'turn'), id)
  elseif TERMINAL[status] then
    set(id, 'finished_at', seconds(t))
    table.insert(finished, id)
    if get(id, 'cancel_at') ~= '' then zrem('flowpp:deadlines', id) end
    if get(id, 'type') ~= 'training' then
      forget_images(id)
      set(id, 'expires_at', seconds(t + RESULT_TTL))
      zadd('flowpp:expiring', seconds(t + RESULT_TTL), id)
    end
    srem('flowpp:unfinished:' .. get(id, 'owner'), id)
    for resource in string.gmatch(get(id, 'uses'), '%S+') do
      srem('flowpp:uses:' .. resource, id)
    end
  end
  data = data or {}
  data.status, data.attempt = status, tonumber(get(id, 'attempt'))
  table.insert(untold, {id, 'status', cjson.encode(data)})
  changed(id)
  return status
end

-- A job keeps its lease while it is asked to stop.
local function wish(id, status, message)
  set_status(id, status)
  local data = {status = status, attempt = tonumber(get(id, 'attempt')), message = message}
  table.insert(untold, {id, 'status', cjson.encode(data)})
  changed(id)
  return status
end

-- Ends an attempt. Its last event, and the first of the next attempt, say why in words.
local function settle(id, outcome, code, message)
  local status = get(id, 'status')
  local data = {message = message}
  if code ~= '' then data.code = code end
  if status == 'cancelling' then
    data.message = get(id, 'cancelled_by')
    if data.message == '' then data.message = 'cancelled' end
    return become(id, 'cancelled', data)
  end
  if outcome == 'succeeded' then return become(id, 'succeeded') end
  if outcome == 'stopped' then
    data.message = status == 'pausing' and 'paused' or 'its worker was told to shut down'
  end
  set(id, 'ended', data.message)
  if outcome == 'crashed' then
    local failures, most = tonumber(get(id, 'failures')) + 1, tonumber(get(id, 'max_attempts'))
    set(id, 'failures', failures)
    if failures >= most then
      outcome = 'failed'
    else
      data.message = string.format('%s; it is tried again after %d of %d failures', message, failures, most)
    end
  end
  if outcome == 'failed' then
    set(id, 'error', cjson.encode({code = code, message = message}))
    return become(id, 'failed', data)
  end
  return become(id, status == 'pausing' and 'paused' or 'queued', data)
end
