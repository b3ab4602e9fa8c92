"""What this machine and environment have, checked before work starts: each finding ok, a warning or a failure."""
