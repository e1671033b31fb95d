"""Towers to a base, base and adapter to a merged model, exports, and the proofs."""
