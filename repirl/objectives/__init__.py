"""The systems that rePIRL unifies: pure functions from streams to streams, one file each."""
