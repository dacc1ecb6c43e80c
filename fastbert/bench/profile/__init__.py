"""How a model's time and memory grow with the length of its sequences: `fastbert profile`.

Each contender lives in a process of its own (`worker`), which times itself and knows its peak memory; `run` asks them in turn,
`growth` reads off the results how they grow, by `fit`; `table` and `figures` show them. `models` says what can be profiled.
"""
