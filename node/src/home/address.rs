//! Addresses of the fleet as people write them; whether one leads anywhere is found out by connecting.

use capsule_proto::credential::MAX_ADDRESS_LEN;

use super::HomeError;

/// Refuses a text that is neither `HOST:PORT` nor a multiaddr with a TCP port.
pub fn check_address(text: &str) -> Result<(), HomeError> {
    if is_address(text) {
        Ok(())
    } else {
        Err(HomeError::Address(text.chars().take(80).collect()))
    }
}

/// Whether a text looks like `HOST:PORT` or a multiaddr.
pub(super) fn is_address(text: &str) -> bool {
    if text.len() > MAX_ADDRESS_LEN {
        return false;
    }
    if text.starts_with('/') {
        let parts: Vec<&str> = text.split('/').skip(1).take(3).collect();
        return text.parse::<capsule_swarm::Multiaddr>().is_ok()
            && matches!(
                parts[..],
                ["ip4" | "ip6" | "dns" | "dns4" | "dns6", _, "tcp"]
            );
    }
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return address.port() != 0;
    }
    let host_char = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
    text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && host.chars().all(host_char)
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in [
            "10.0.0.1:1",
            "[::1]:80",
            "lab-pc.example:4277",
            "/ip4/10.0.0.1/tcp/4277",
            "/dns4/lab/tcp/1",
        ] {
            assert!(check_address(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "lab",
            "lab:",
            ":1",
            "lab:0",
            "10.0.0.1:0",
            "lab:99999",
            "a b:1",
            "/ip4/x",
            "/ip4/10.0.0.1",
            "/ip4/10.0.0.1/udp/4277",
            "http://lab:1",
        ] {
            let refused = check_address(bad).unwrap_err().to_string();
            assert!(refused.contains("HOST:PORT"), "{bad}: {refused}");
        }
    }
}
