"""Tasks whose answers can be checked, rewards, and the processes that compute them."""
