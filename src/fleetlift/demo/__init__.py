"""The main job end to end on this machine, with recorded real vehicles."""
