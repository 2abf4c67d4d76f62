"""The transitions of jobs, each one Lua script: atomic, on Redis's clock, refusing what status or attempt forbids.

flowpp:sequence              counts records, so that indices have the order of creation
flowpp:job:<id>              hash: the record
flowpp:job:<id>:events       stream
flowpp:job:<id>:checkpoints  set of the ids of its checkpoints
flowpp:jobs, flowpp:jobs:type:<type>, flowpp:jobs:owner:<owner>  sorted sets of job ids by sequence
flowpp:unfinished:<owner>    set of the ids of an owner's unfinished jobs
flowpp:queued:<queue>        sorted set of the ids of waiting jobs by their turn
flowpp:turn:<queue>          hash: the turn of the job that was claimed last (''), and the next one of each owner
flowpp:awake:inference       sorted set of the workers that look into the queue without a bell, by when they cease to
flowpp:leases                sorted set of the ids of jobs that a worker holds, by the end of the lease
flowpp:deleting              set of the ids of jobs that shall be deleted when they have ended
flowpp:uses:<id>             set of the ids of unfinished jobs that need a dataset or checkpoint
flowpp:dataset:<id>, flowpp:checkpoint:<id>, flowpp:key:<id>  records (JSON), indexed as jobs are: flowpp:datasets, ...
flowpp:bytes                 hash: the bytes of each owner's datasets and checkpoints
flowpp:finished              channel on which the id of each job that ends is published
flowpp:created:<owner>:<key> what a request with this Idempotency-Key has created, or that one is under way
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

MAX_EVENTS = 100_000
"""Events kept of a job, about; the oldest give way."""


def job_key(job_id: str) -> str:
    return f"flowpp:job:{job_id}"


_PRELUDE = (
    f"local MAX_EVENTS = {MAX_EVENTS}"
    + """
local TERMINAL = {succeeded = true, failed = true, cancelled = true}
local HELD = {running = true, pausing = true, cancelling = true}

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function seconds(t) return string.format('%.6f', t) end
local function key(id) return 'flowpp:job:' .. id end
local function get(id, field) return redis.call('HGET', key(id), field) or '' end
local function set(id, ...) redis.call('HSET', key(id), ...) end

local function emit(id, kind, data)
  return redis.call('XADD', key(id) .. ':events', 'MAXLEN', '~', MAX_EVENTS, '*', 'type', kind, 'data', data)
end

-- The attempt that writes is the one that holds the job: else its writes are refused.
local function current(id, attempt)
  local status = get(id, 'status')
  if HELD[status] and get(id, 'attempt') == attempt then return status end
  return nil
end

local function kind_of(resource)
  return string.sub(resource, 1, 3) == 'ds_' and 'dataset' or 'checkpoint'
end

local function owner_of(record) return record.owner or 'local' end

-- Indices of datasets, checkpoints and keys, and what they take of their owner's quota.
local function index(kind, id, record, sequence)
  local list = 'flowpp:' .. kind .. 's'
  redis.call('ZADD', list, sequence, id)
  redis.call('ZADD', list .. ':owner:' .. owner_of(record), sequence, id)
  if record.bytes then redis.call('HINCRBY', 'flowpp:bytes', owner_of(record), record.bytes) end
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
  return true
end

-- Indices of a job by what its record says.
local function index_job(id)
  local sequence, owner = get(id, 'sequence'), get(id, 'owner')
  redis.call('ZADD', 'flowpp:jobs', sequence, id)
  redis.call('ZADD', 'flowpp:jobs:type:' .. get(id, 'type'), sequence, id)
  redis.call('ZADD', 'flowpp:jobs:owner:' .. owner, sequence, id)
  if not TERMINAL[get(id, 'status')] then redis.call('SADD', 'flowpp:unfinished:' .. owner, id) end
end

-- What a request with an Idempotency-Key has created: told to whoever sends it again, for a day.
local function created(claim, id)
  if claim ~= '' then
    local said = cjson.decode(claim)
    redis.call('SET', said.key, cjson.encode({fingerprint = said.fingerprint, id = id}), 'EX', 86400)
  end
end

-- A job's turn, kept for its life: owners take turns in proportion to what their jobs ask for, however many they send
-- (start-time fair queueing; Goyal, Vin, Cheng 1996).
local function take_turn(id, queue)
  local turns, owner = 'flowpp:turn:' .. queue, get(id, 'owner')
  local turn = math.max(tonumber(redis.call('HGET', turns, '') or 0), tonumber(redis.call('HGET', turns, owner) or 0))
  redis.call('HSET', turns, owner, string.format('%.0f', turn + math.max(1, tonumber(get(id, 'size')))))
  set(id, 'turn', string.format('%.0f', turn))
end

-- The one place where a status changes.
local function become(id, status, data)
  local queue, t = get(id, 'queue'), now()
  redis.call('ZREM', 'flowpp:queued:' .. queue, id)
  redis.call('ZREM', 'flowpp:leases', id)
  set(id, 'status', status)
  if status == 'queued' then
    if get(id, 'turn') == '' then take_turn(id, queue) end
    redis.call('ZADD', 'flowpp:queued:' .. queue, get(id, 'turn'), id)
  elseif TERMINAL[status] then
    set(id, 'finished_at', seconds(t))
    redis.call('PUBLISH', 'flowpp:finished', id)
    redis.call('SREM', 'flowpp:unfinished:' .. get(id, 'owner'), id)
    for resource in string.gmatch(get(id, 'uses'), '%S+') do
      redis.call('SREM', 'flowpp:uses:' .. resource, id)
    end
  end
  data = data or {}
  data.status, data.attempt = status, tonumber(get(id, 'attempt'))
  emit(id, 'status', cjson.encode(data))
  return status
end

-- A job keeps its lease while it is asked to stop.
local function wish(id, status)
  set(id, 'status', status)
  emit(id, 'status', cjson.encode({status = status, attempt = tonumber(get(id, 'attempt'))}))
  return status
end

-- Ends an attempt. Its last event, and the first of the next attempt, say why in words.
local function settle(id, outcome, code, message)
  local status = get(id, 'status')
  local data = {message = message}
  if code ~= '' then data.code = code end
  if status == 'cancelling' then
    data.message = 'cancelled'
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
"""
)

_SUBMIT = """
local id, limit, most, claim = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local fields = cjson.decode(ARGV[5])
if redis.call('ZCARD', 'flowpp:queued:' .. fields.queue) >= limit then return 'full' end
if redis.call('SCARD', 'flowpp:unfinished:' .. fields.owner) >= most then return 'quota' end
for resource in string.gmatch(fields.uses, '%S+') do
  if redis.call('EXISTS', 'flowpp:' .. kind_of(resource) .. ':' .. resource) == 0 then return resource end
end
for resource in string.gmatch(fields.uses, '%S+') do redis.call('SADD', 'flowpp:uses:' .. resource, id) end
for name, value in pairs(fields) do set(id, name, value) end
local sequence = redis.call('INCR', 'flowpp:sequence')
set(id, 'created_at', seconds(now()), 'sequence', sequence, 'attempt', 0, 'failures', 0)
index_job(id)
become(id, 'queued')
created(claim, id)
local t = seconds(now())
local awake = redis.call('ZCOUNT', 'flowpp:awake:' .. fields.queue, t, '+inf')
if awake > 0 and awake >= redis.call('ZCOUNT', 'flowpp:workers:' .. fields.queue, t, '+inf') then return 'heard' end
return ''
"""

_CLAIM = """
local queue, worker, lease, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local large, larges, awake = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local waiting = redis.call('ZRANGE', 'flowpp:queued:' .. queue, 0, 255)
local taken, group, filled = {}, nil, 0
for _, id in ipairs(waiting) do
  local size = tonumber(get(id, 'size'))
  local fits = filled + size <= capacity or #taken == 0
  if size > large then fits = larges > 0 end
  if fits and (#taken == 0 or get(id, 'group') == group) then
    group = get(id, 'group')
    if size > large then larges = larges - 1 else filled = filled + size end
    set(id, 'attempt', tonumber(get(id, 'attempt')) + 1)
    redis.call('HSETNX', key(id), 'started_at', seconds(now()))
    local said = 'attempt ' .. get(id, 'attempt') .. ' begins'
    if get(id, 'ended') ~= '' then said = said .. '; the one before ended: ' .. get(id, 'ended') end
    become(id, 'running', {worker = worker, message = said})
    redis.call('ZADD', 'flowpp:leases', seconds(now() + lease), id)
    table.insert(taken, id)
    redis.call('HSET', 'flowpp:turn:' .. queue, '', get(id, 'turn'))
    if group == '' or filled >= capacity then break end
  end
end
if awake > 0 then
  local t, until_ = now(), tonumber(redis.call('ZSCORE', 'flowpp:awake:' .. queue, worker) or 0)
  if #taken > 0 or until_ - t < awake / 2 then
    redis.call('ZADD', 'flowpp:awake:' .. queue, seconds(t + awake), worker)
  end
end
return taken
"""

_SLEEP = """
local queue, worker = ARGV[1], ARGV[2]
if redis.call('ZCARD', 'flowpp:queued:' .. queue) > 0 then return 0 end
redis.call('ZREM', 'flowpp:awake:' .. queue, worker)
return 1
"""

_RENEW = """
local id, attempt, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local status = current(id, attempt)
if status and lease > 0 then redis.call('ZADD', 'flowpp:leases', 'XX', seconds(now() + lease), id) end
return status
"""

_SET_FIELD = """
local id, attempt, field, value = unpack(ARGV)
local status = current(id, attempt)
if status then set(id, field, value) end
return status
"""

_APPEND = """
local id, attempt, kind, data = unpack(ARGV)
if not current(id, attempt) then return nil end
return emit(id, kind, data)
"""

_END = """
local id, attempt, outcome, code, message, result, artifacts, progress = unpack(ARGV)
if not current(id, attempt) then return nil end
if progress ~= '' then set(id, 'progress', progress) end
if result ~= '' then set(id, 'result', result) end
if artifacts ~= '' then set(id, 'artifacts', artifacts) end
return settle(id, outcome, code, message)
"""

_REAP = """
local lease, may_end = tonumber(ARGV[1]), ARGV[2] == '1'
-- A lease that ends later than any can was given before the clock was put back.
local latest = seconds(now() + lease)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'flowpp:leases', '(' .. latest, '+inf')) do
  redis.call('ZADD', 'flowpp:leases', latest, id)
end
if not may_end then return {} end
local ended = redis.call('ZRANGEBYSCORE', 'flowpp:leases', '-inf', seconds(now()), 'LIMIT', 0, 100)
for _, id in ipairs(ended) do
  settle(id, 'crashed', 'worker_lost', 'the worker that held the job was lost: its lease ran out')
end
return ended
"""

_CANCEL = """
local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if TERMINAL[status] then return 'refused ' .. status end
if status == 'queued' or status == 'paused' then return become(id, 'cancelled') end
if status == 'cancelling' then return status end
return wish(id, 'cancelling')
"""

_PAUSE = """
local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if status == 'pausing' or status == 'paused' then return status end
if get(id, 'type') ~= 'training' or (status ~= 'queued' and status ~= 'running') then return 'refused ' .. status end
if status == 'queued' then return become(id, 'paused') end
return wish(id, 'pausing')
"""

_RESUME = """
local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if status ~= 'paused' then return 'refused ' .. status end
return become(id, 'queued')
"""

_DELETE = """
local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
local checkpoints = redis.call('SMEMBERS', key(id) .. ':checkpoints')
for _, checkpoint in ipairs(checkpoints) do
  if redis.call('SCARD', 'flowpp:uses:' .. checkpoint) > 0 then return 'refused in_use' end
end
if HELD[status] then
  redis.call('SADD', 'flowpp:deleting', id)
  return status == 'cancelling' and status or wish(id, 'cancelling')
end
if not TERMINAL[status] then become(id, 'cancelled') end
for _, checkpoint in ipairs(checkpoints) do remove('checkpoint', checkpoint) end
redis.call('SREM', 'flowpp:deleting', id)
redis.call('ZREM', 'flowpp:jobs', id)
redis.call('ZREM', 'flowpp:jobs:type:' .. get(id, 'type'), id)
redis.call('ZREM', 'flowpp:jobs:owner:' .. get(id, 'owner'), id)
redis.call('DEL', key(id), key(id) .. ':events', key(id) .. ':checkpoints')
return 'deleted'
"""

_REGISTER = """
local kind, id, record, job, attempt, claim = unpack(ARGV)
if job ~= '' then
  if not current(job, attempt) then return 0 end
  redis.call('SADD', key(job) .. ':checkpoints', id)
end
redis.call('SET', 'flowpp:' .. kind .. ':' .. id, record)
index(kind, id, cjson.decode(record), redis.call('INCR', 'flowpp:sequence'))
created(claim, id)
return 1
"""

_UNREGISTER = """
local kind, id, job = unpack(ARGV)
if redis.call('SCARD', 'flowpp:uses:' .. id) > 0 then return 'in_use' end
if not remove(kind, id) then return 'missing' end
if job ~= '' then redis.call('SREM', key(job) .. ':checkpoints', id) end
return 'deleted'
"""


class Transitions:
    """The scripts of one Redis server. Those for workers answer None where the attempt is stale."""

    def __init__(self, redis: Redis) -> None:
        def script(body: str) -> Any:
            return redis.register_script(_PRELUDE + body)

        self._submit = script(_SUBMIT)
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._claim = script(_CLAIM)
        self._sleep = script(_SLEEP)
        self._renew = script(_RENEW)
        self._set_field = script(_SET_FIELD)
        self._append = script(_APPEND)
        self._end = script(_END)
        self._reap = script(_REAP)
        self._register = script(_REGISTER)
        self._unregister = script(_UNREGISTER)
        self._asked = {
            "cancel": script(_CANCEL),
            "pause": script(_PAUSE),
            "resume": script(_RESUME),
            "delete": script(_DELETE),
        }

    def submit(self, job_id: str, max_queued: int, max_jobs: int, claim: str, fields: Mapping[str, str]) -> str:
        """'' where the job is queued now, 'heard' where it is and each worker looks without a bell; else why it is not:
        'full', 'quota', or the id of what it uses and does not exist."""
        return self._submit(args=[job_id, max_queued, max_jobs, claim, json.dumps(fields)])

    def claim(
        self, queue: str, worker: str, lease_seconds: float, capacity: int, large: int, larges: int, awake: float
    ) -> list[str]:
        """The ids of the jobs that now run under a lease of `worker`."""
        return self._claim(args=[queue, worker, lease_seconds, capacity, large, larges, awake])

    def sleep(self, queue: str, worker: str) -> bool:
        """Whether nothing waits, so that the worker may wait for a bell."""
        return bool(self._sleep(args=[queue, worker]))

    def renew(self, job_id: str, attempt: int, lease_seconds: float) -> str | None:
        """The job's status; 0 seconds leave the lease as it is."""
        return self._renew(args=[job_id, attempt, lease_seconds])

    def set_field(self, job_id: str, attempt: int, field: str, value: str) -> str | None:
        """The job's status."""
        return self._set_field(args=[job_id, attempt, field, value])

    def append(self, job_id: str, attempt: int, kind: str, data: str) -> str | None:
        """The id of the new event."""
        return self._append(args=[job_id, attempt, kind, data])

    def end(self, endings: Sequence[Sequence[str | int]]) -> list[str | None]:
        """The jobs' new statuses, each by (id, attempt, outcome, code, message, result, artifacts, progress)."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for ending in endings:
                self._end(args=ending, client=pipeline)
            return pipeline.execute()

    def reap(self, lease_seconds: float, may_end: bool) -> list[str]:
        """The ids of the jobs whose attempt was ended; none is where `may_end` forbids it."""
        return self._reap(args=[lease_seconds, int(may_end)])

    def ask(self, transition: str, job_id: str) -> str:
        """The job's new status, 'missing', or 'refused' with the status that forbids it."""
        return self._asked[transition](args=[job_id])

    def register(
        self, kind: str, record_id: str, record: str, job_id: str = "", attempt: int = 0, claim: str = ""
    ) -> bool:
        """Whether the record was written: one of a job only where the attempt is current."""
        return bool(self._register(args=[kind, record_id, record, job_id, attempt, claim]))

    def unregister(self, kind: str, record_id: str, job_id: str = "") -> str:
        """'deleted', 'missing' or 'in_use'."""
        return self._unregister(args=[kind, record_id, job_id])
