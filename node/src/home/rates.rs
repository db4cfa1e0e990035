//! `rates.json`: caps of rates, as people set them with `capsule rates`.

use std::fmt;

use capsule_swarm::{Caps, Schedule};
use serde::{Deserialize, Deserializer, Serialize};

/// What is capped, when: by direction and by where the peer is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Sent to peers within this machine's site.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub upload_within: Schedule,
    /// Sent to peers beyond it.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub upload_beyond: Schedule,
    /// Received from peers within it.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub download_within: Schedule,
    /// Received from peers beyond it.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub download_beyond: Schedule,
}

impl Rates {
    /// The caps at a minute of the day: of what is sent, and of what is received.
    pub fn at(&self, minute: u16) -> [Caps; 2] {
        let caps = |within: &Schedule, beyond: &Schedule| Caps {
            within: within.at(minute),
            beyond: beyond.at(minute),
        };
        [
            caps(&self.upload_within, &self.upload_beyond),
            caps(&self.download_within, &self.download_beyond),
        ]
    }
}

fn write<S: serde::Serializer>(schedule: &Schedule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(schedule)
}

/// Reads a schedule, or says in which text of the file none is.
fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Schedule, D::Error> {
    struct Text;
    impl serde::de::Visitor<'_> for Text {
        type Value = Schedule;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text such as \"5 Mbit/s, 22:00-06:00 unlimited\"")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Schedule, E> {
            text.parse().map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_kept_as_texts_and_what_is_left_out_has_no_cap() {
        let text =
            r#"{"upload_beyond":"5 Mbit/s, 22:00-06:00 unlimited","download_within":"1 MB/s"}"#;
        let rates: Rates = serde_json::from_str(text).unwrap();
        let [upload, download] = rates.at(12 * 60);
        let written = |cap: Option<capsule_swarm::Rate>| cap.map(|rate| rate.to_string());
        assert_eq!(written(upload.beyond).as_deref(), Some("5 Mbit/s"));
        assert_eq!(written(download.within).as_deref(), Some("8 Mbit/s"));
        assert_eq!((upload.within, download.beyond), (None, None));
        assert_eq!(rates.at(23 * 60)[0], Caps::default());
        let again = serde_json::to_string(&rates).unwrap();
        assert_eq!(serde_json::from_str::<Rates>(&again).unwrap(), rates);
        assert!(again.contains(r#""upload_within":"unlimited""#), "{again}");
    }

    #[test]
    fn what_is_wrong_is_told() {
        let refused = |text: &str| serde_json::from_str::<Rates>(text).unwrap_err().to_string();
        let rate = refused(r#"{"upload_beyond": "5 Mbps"}"#);
        assert!(rate.contains("\"5 Mbps\" is not a rate"), "{rate}");
        let kind = refused(r#"{"upload_beyond": 5}"#);
        assert!(
            kind.contains("expected a text such as \"5 Mbit/s"),
            "{kind}"
        );
        let key = refused(r#"{"upload": "5 Mbit/s"}"#);
        assert!(
            key.contains("`upload`") && key.contains("`upload_within`"),
            "{key}"
        );
    }
}
