"""The inside of the sandbox (repirl.verify.sandbox): what runs in its processes. Nothing but the standard library is
imported here, and all imports of its own are relative: the processes load this folder alone, under another name."""
