"""Many runs and what they say together: models x seeds x splits of one experiment, and the leaderboard of it."""
