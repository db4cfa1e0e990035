//! What the demo found out, for people and for programs.

use std::time::Duration;

use serde::Serialize;

use crate::cli::format::{duration, plural, size};
use crate::cli::style::Style;
use crate::cli::table::Table;

/// The demo's result; the keys of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether the exported copies are the originals and every node's capsule verified.
    pub identical: bool,
    /// Nodes, the publisher included.
    pub nodes: usize,
    /// Regular files published.
    pub files: u64,
    /// Bytes of content published.
    pub content_bytes: u64,
    /// Bytes that a node fetches: manifest, indexes and packs.
    pub fetch_bytes: u64,
    /// Of these, bytes of packs.
    pub pack_bytes: u64,
    /// How long publishing took.
    pub publish_seconds: f64,
    /// From the first pull's begin to the last one's end.
    pub pull_seconds: f64,
    /// The publisher.
    pub publisher: Publisher,
    /// The other nodes.
    pub pulls: Vec<NodePull>,
    /// The exported copy.
    pub export: ExportReport,
    /// The second half.
    pub update: UpdateReport,
    /// Nodes whose store was read again and verified.
    pub verified_nodes: usize,
    /// The whole demo.
    pub seconds: f64,
}

/// What the publisher sent.
#[derive(Debug, Clone, Serialize)]
pub struct Publisher {
    /// Content bytes sent to all others.
    pub sent_bytes: u64,
    /// As a multiple of the packs' size.
    pub copies: f64,
}

/// A node's pull.
#[derive(Debug, Clone, Serialize)]
pub struct NodePull {
    /// Its name.
    pub node: String,
    /// From the request to everything verified, durable and checked.
    pub seconds: f64,
    /// Of these, finding the name, manifest and indexes.
    pub planning_seconds: f64,
    /// Of these, from the first request for packs until they are verified and durable.
    pub fetch_seconds: f64,
    /// Of these, checking the tree against its root hash.
    pub check_seconds: f64,
    /// Bytes fetched.
    pub bytes: u64,
    /// Bytes fetched by seconds.
    pub bytes_per_second: u64,
    /// Of the bytes, those from the publisher.
    pub from_publisher: u64,
    /// Of the bytes, those from the other nodes.
    pub from_peers: u64,
}

/// The update: what changed, and what all others fetched of it.
#[derive(Debug, Clone, Serialize)]
pub struct UpdateReport {
    /// Files that are new, or have new content.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Bytes of a `tar.zst` of these files.
    pub archive_bytes: u64,
    /// Bytes that a node fetches: manifest, indexes and packs.
    pub fetch_bytes: u64,
    /// Of these, bytes of packs.
    pub pack_bytes: u64,
    /// How long publishing took.
    pub publish_seconds: f64,
    /// From the first pull's begin to the last one's end.
    pub pull_seconds: f64,
    /// The exported copy.
    pub export: ExportReport,
}

/// The exported copy beside the original.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The node that exported.
    pub node: String,
    /// How long the export took.
    pub seconds: f64,
    /// Files compared.
    pub files: u64,
    /// Bytes compared.
    pub bytes: u64,
    /// What differs.
    pub differences: Vec<String>,
}

impl Report {
    /// The table for people.
    pub fn render(&self, style: Style) -> String {
        let mut table = Table::new(&[
            "NODE",
            ">SECONDS",
            ">MB/s",
            ">FETCHED",
            ">FROM PUBLISHER",
            ">FROM PEERS",
        ]);
        for pull in &self.pulls {
            table.row([
                pull.node.clone(),
                format!("{:.2}", pull.seconds),
                format!("{:.1}", pull.bytes_per_second as f64 / 1e6),
                size(pull.bytes),
                size(pull.from_publisher),
                size(pull.from_peers),
            ]);
        }
        let verdict = if self.identical {
            style.green("identical")
        } else {
            style.red("DIFFERENT")
        };
        format!(
            "{}\n{}\npublisher sent {}, {} of the packs ({}), for {} to hold all of it\n\
             exports of {}: {}, {} compared byte by byte: {verdict}; {} verified\n\
             done in {}\n",
            table.render(style),
            self.render_update(style),
            size(self.publisher.sent_bytes),
            style.bold(&format!("{:.2} copies", self.publisher.copies)),
            size(self.pack_bytes),
            plural(self.pulls.len() as u64, "other node"),
            self.export.node,
            plural(self.export.files + self.update.export.files, "file"),
            size(self.export.bytes + self.update.export.bytes),
            plural(self.verified_nodes as u64, "node"),
            duration(Duration::try_from_secs_f64(self.seconds).unwrap_or_default()),
        )
    }
}

impl Report {
    /// What each node fetched for the update, beside other ways to bring it.
    fn render_update(&self, style: Style) -> String {
        let UpdateReport {
            fetch_bytes,
            archive_bytes,
            ..
        } = self.update;
        let mut table = Table::new(&["THE UPDATE, TO EACH NODE", ">BYTES", ">x FETCHED"]);
        let ways = [
            ("fetched", fetch_bytes),
            ("a tar.zst of the new and changed files", archive_bytes),
            ("the first version, whole", self.fetch_bytes),
        ];
        for (way, bytes) in ways {
            let ratio = bytes as f64 / fetch_bytes.max(1) as f64;
            table.row([way.to_owned(), size(bytes), format!("{ratio:.2}")]);
        }
        table.render(style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_where_bytes_came_from() {
        let pull = NodePull {
            node: "pc-1".into(),
            seconds: 2.0,
            planning_seconds: 0.1,
            fetch_seconds: 1.5,
            check_seconds: 0.4,
            bytes: 200_000_000,
            bytes_per_second: 100_000_000,
            from_publisher: 1 << 20,
            from_peers: 3 << 20,
        };
        let export = ExportReport {
            node: "pc-1".into(),
            seconds: 1.0,
            files: 1,
            bytes: 5,
            differences: Vec::new(),
        };
        let report = Report {
            identical: true,
            nodes: 2,
            files: 1,
            content_bytes: 5,
            fetch_bytes: 4 << 20,
            pack_bytes: 4 << 20,
            publish_seconds: 1.0,
            pull_seconds: 2.0,
            publisher: Publisher {
                sent_bytes: 5 << 20,
                copies: 1.25,
            },
            pulls: vec![pull],
            update: UpdateReport {
                files: 3,
                bytes: 10,
                archive_bytes: 3 << 20,
                fetch_bytes: 2 << 20,
                pack_bytes: 1 << 20,
                publish_seconds: 0.1,
                pull_seconds: 0.2,
                export: export.clone(),
            },
            export,
            verified_nodes: 2,
            seconds: 12.0,
        };
        let text = report.render(Style::PLAIN);
        let row = text.lines().nth(1).unwrap();
        assert_eq!(
            row.split_whitespace().collect::<Vec<_>>().join(" "),
            "pc-1 2.00 100.0 191 MiB 1.00 MiB 3.00 MiB"
        );
        assert!(
            text.contains("1.25 copies of the packs (4.00 MiB), for 1 other node"),
            "{text}"
        );
        for row in [
            "fetched 2.00 MiB 1.00",
            "files 3.00 MiB 1.50",
            "whole 4.00 MiB 2.00",
        ] {
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words.contains(row), "{text}");
        }
        assert!(
            text.contains("identical; 2 nodes verified\ndone in 12 s\n"),
            "{text}"
        );
    }
}
