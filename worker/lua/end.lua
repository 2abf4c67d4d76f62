local id, attempt, outcome, code, message, result, artifacts, progress = unpack(ARGV)
if not current(id, attempt) then return nil end
if progress ~= '' then set(id, 'progress', progress) end
if result ~= '' then set(id, 'result', result) end
if artifacts ~= '' then set(id, 'artifacts', artifacts) end
return settle(id, outcome, code, message)
