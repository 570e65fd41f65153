# For `ray up` without Kubernetes: a role for the head, which starts and ends machines, one for the workers, which only
# use the store, and a network that lets in nobody but you. ray-aws.yaml names what is made here.

resource "aws_iam_role" "ray" {
  for_each           = toset(["head", "worker"])
  name               = "${var.name}-ray-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.assume_node.json
}

resource "aws_iam_instance_profile" "ray" {
  for_each = aws_iam_role.ray
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy" "ray_store" {
  for_each = aws_iam_role.ray
  name     = "store"
  role     = each.value.id
  policy   = data.aws_iam_policy_document.work.json
}

resource "aws_iam_role_policy_attachment" "ray_images" {
  for_each   = aws_iam_role.ray
  role       = each.value.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonEC2ContainerRegistryPullOnly"
}

resource "aws_iam_role_policy" "ray_head" {
  name   = "machines"
  role   = aws_iam_role.ray["head"].id
  policy = data.aws_iam_policy_document.ray_head.json
}

# Ray gives every machine the tag ray-cluster-name when it starts it.
data "aws_iam_policy_document" "ray_head" {
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages"]
    resources = ["*"] # these know no narrower resource
  }

  statement {
    sid       = "StartTagged"
    actions   = ["ec2:RunInstances"]
    resources = ["arn:aws:ec2:${var.region}:${var.account}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }

  statement {
    sid     = "StartWith"
    actions = ["ec2:RunInstances"]

    resources = concat(
      ["arn:aws:ec2:${var.region}::image/*", aws_security_group.ray.arn],
      [for subnet in aws_subnet.public : subnet.arn],
      [
        for kind in ["key-pair", "network-interface", "spot-instances-request", "volume"] :
        "arn:aws:ec2:${var.region}:${var.account}:${kind}/*"
      ],
    )
  }

  statement {
    sid       = "TagAtStart"
    actions   = ["ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:${var.account}:*/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }

  statement {
    sid       = "TagAndEnd"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["arn:aws:ec2:${var.region}:${var.account}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }

  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.ray["worker"].arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_security_group" "ray" {
  name        = "${var.name}-ray"
  description = "Ray machines reach each other; SSH from the networks of the settings"
  vpc_id      = aws_vpc.main.id
}

resource "aws_vpc_security_group_ingress_rule" "ray_inside" {
  security_group_id            = aws_security_group.ray.id
  referenced_security_group_id = aws_security_group.ray.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_ingress_rule" "ray_ssh" {
  for_each          = toset(var.api_networks)
  security_group_id = aws_security_group.ray.id
  cidr_ipv4         = each.key
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
}

resource "aws_vpc_security_group_egress_rule" "ray" {
  security_group_id = aws_security_group.ray.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}
