"""What the launcher prints.

terminal   aligned, coloured lines, one prefix per source
logs       follows the jobs' log files and shows their lines
progress   what the teachers are doing until they are ready
text       numbers and tables as text
"""
