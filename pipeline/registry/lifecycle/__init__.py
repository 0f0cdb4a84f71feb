"""What happens to a package after it was published: channels move, versions are yanked and removed.

    records.py   what is signed here: a move of a channel, a yank; read and written strictly
    channels.py  the log of moves: verified, and appended to by compare-and-swap
    pointers.py  where the channels point, for those who look packages up
    evidence.py  is what lies at a place signed, and good enough for a channel?
    lookup.py    a reference -> the one version that it means here
    promote.py   promote and rollback
    yank.py      yank, and what a reader makes of it
    gc.py        which versions may go, and the sweep
    command.py   what the commands do, less the command line
    render.py    tables for people

    <channel>.<card>.<seq>.dsse.json    one move, signed, never changed; each names the one before
    <channel>.<card>.json               the newest move, unsigned, for people and for curl

All of it works on the Protocol `WritableStore`, so on a folder, on S3 and on an OCI registry.

A reader believes the log alone. It holds no memory of it, so it cannot see that the newest moves
were taken away (see docs/reliability.md); deployments pin digests.
"""
