"""The activation store, from keys to staged copies: each module imports only those before it in this list.

backend, shards, layout, moments, mapping, split, objects, reader, writer, prepare, staging.
"""
