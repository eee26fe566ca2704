"""Who is who between hospitals: keys, certificates, signatures, revocation. Cryptography only; no model, no record."""
