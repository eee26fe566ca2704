"""A sum of updates of which the coordinator learns nothing else, against a coordinator that lies and sites that vanish.

Double masking after Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, in the
variant for a server that does not follow the protocol. Every site hides its vector under a mask of its own and one it shares
with each other site; those cancel in the sum. Secrets are dealt out in shares, so that the masks of sites that vanish can be
taken off again. What it does not hide is the sum: that is what noise is for.

    rounding     numbers as integers of a 32-bit ring in which the sum cannot wrap
    masks        keys of masks, and masks as streams of AES-256-CTR
    shamir       a secret in shares, of which any t make it and fewer say nothing
    shares       shares in boxes that only their receiver can open
    occasion     what a sum is of: the public numbers of a plan; study, run, round and attempt
    messages     what a site says: advert, shares, masked, agree, reveal; all signed
    turns        the sums a site has begun, on disk, so that none is begun twice
    site         the hospital's half, and what it refuses
    coordinator  the coordinator's half
"""
