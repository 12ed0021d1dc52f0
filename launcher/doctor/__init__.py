"""`shmbridge-launch doctor`: checks of this machine, as facts with a status and a remedy."""
