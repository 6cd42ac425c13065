//! The join token: what a new node must know to trust the cluster, and to be trusted by it.
//!
//! ```text
//!   csv1-<hex of: node 2 | SHA-256 of the authority's certificate 32 | secret 16 | address>
//! ```
//! The new node believes the peer at `address` only if the authority behind its certificate has this digest; the cluster
//! believes the new node because it knows the secret, of which the records keep a digest.

use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, digest};
use uuid::Uuid;

use crate::WireError;

const PREFIX: &str = "csv1-";
const FIXED_BYTES: usize = 2 + 32 + 16;
/// Longest `host:port`: a DNS name has at most 253 bytes.
const ADDRESS_BYTES_MAX: usize = 300;

/// SHA-256.
pub type Digest = [u8; 32];

/// Digest of anything, such as a certificate in DER or a secret.
#[must_use]
pub fn sha256(bytes: &[u8]) -> Digest {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// A join token. Whoever has it may join a node once; its text is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The member that answers at the address.
    pub node: u16,
    /// Where it listens, `host:port`.
    pub address: String,
    /// Digest of the authority's certificate.
    pub authority: Digest,
    /// 122 random bits.
    pub secret: [u8; 16],
}

impl JoinToken {
    /// A new token for joining by way of the member `node`.
    #[must_use]
    pub fn new(node: u16, address: &str, authority: Digest) -> Self {
        Self { node, address: address.to_owned(), authority, secret: Uuid::new_v4().into_bytes() }
    }

    /// What the records keep instead of the secret.
    #[must_use]
    pub fn digest(&self) -> Digest {
        sha256(&self.secret)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        let parts: [&[u8]; 4] =
            [&self.node.to_be_bytes(), &self.authority, &self.secret, self.address.as_bytes()];
        parts.concat().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("node", &self.node)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let bytes = text.trim().strip_prefix(PREFIX).and_then(unhex).ok_or_else(no_token)?;
        let (fixed, address) = bytes.split_at_checked(FIXED_BYTES).ok_or_else(no_token)?;
        let address = std::str::from_utf8(address).map_err(|_| no_token())?;
        if address.is_empty() || address.len() > ADDRESS_BYTES_MAX || !address.contains(':') {
            return Err(no_token());
        }
        let mut token = Self {
            node: u16::from_be_bytes([fixed[0], fixed[1]]),
            address: address.to_owned(),
            authority: [0; 32],
            secret: [0; 16],
        };
        token.authority.copy_from_slice(&fixed[2..34]);
        token.secret.copy_from_slice(&fixed[34..]);
        Ok(token)
    }
}

fn no_token() -> WireError {
    WireError::BadIdentity {
        what: "the text is not a join token; `csvctl cluster token` makes one".to_owned(),
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || digits.len() / 2 > FIXED_BYTES + ADDRESS_BYTES_MAX {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    digits.chunks_exact(2).map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_survives_being_copied_as_text() {
        let token = JoinToken::new(3, "san-node-1.example:7400", [7; 32]);
        let read: JoinToken = format!("  {token}\n").parse().expect("its own text");
        assert_eq!(read, token);
        assert!(!format!("{token:?}").contains(&token.to_string()), "a log must not show the secret");
    }

    #[test]
    fn what_is_no_token_is_refused_with_a_hint() {
        let good = JoinToken::new(1, "a:1", [0; 32]).to_string();
        for bad in
            ["", "csv1-", "csv2-00", &good[..good.len() - 1], &good[..40], &good.replace("csv1", "csv9")]
        {
            let error = bad.parse::<JoinToken>().expect_err(bad);
            assert!(error.to_string().contains("csvctl cluster token"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_or_an_error(text in "(csv1-)?[0-9a-fz]{0,200}") {
            let _outcome = text.parse::<JoinToken>();
        }
    }
}
