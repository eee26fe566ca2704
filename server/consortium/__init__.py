"""The consortium's own folder, on a machine that needs no network: who is invited, enrolled, revoked. For people."""
