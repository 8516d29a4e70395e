"""Sites: what an adapter can be on, and how its weight is read, stored and multiplied with."""
